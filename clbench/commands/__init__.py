"""The commands of `clbench`, one file each: options, call, exit code."""
