"""Strangers' files: which layout a folder has, what its tensors are called here, what its config means.

`source` reads tensors, `config` reads architectures, `layout` holds what all layouts share; each other file is one
layout, pure renaming that can be tested on strings. `detect` chooses among them. Nothing here builds modules.
"""
