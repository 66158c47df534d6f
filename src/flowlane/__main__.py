"""``python -m flowlane``: the same as the ``flowlane`` command."""

from flowlane.cli import main

if __name__ == "__main__":
    main()
