"""Runs the `robustfeat` command for `python -m robustfeat`."""

from robustfeat.cli import main

if __name__ == "__main__":
    main()
