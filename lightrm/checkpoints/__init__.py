"""Strangers' files: which layout a folder has, how its tensors are named, what its config means.

`source` reads tensors, `config` reads architectures, `layout` holds what all layouts share. Each layout is a file with
a renaming that can be tested on strings; `detect` chooses among them. `quantized` does the same for the formats of
other tools, each a file called `..._files`. Nothing here builds modules.
"""
