"""`python -m robustfeat` is the command `robustfeat`."""

from robustfeat.cli import main

if __name__ == "__main__":
    main()
