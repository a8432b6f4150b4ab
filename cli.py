"""Run qsearch from a checkout: `python cli.py search`."""

from qsearch.commands.app import main

if __name__ == "__main__":
    main()
