"""How the bundled demo model was made, in the open: not part of the installed package.

Read in this order: records (what is read), corruptions (what a bad answer is), network (what is trained),
pretrain and prefer (the two stages), build (the command that runs them all).
"""
