"""The flags of the scripts: typed fields with a range each, in groups that scripts share. Imports no torch, so that --help is quick."""
