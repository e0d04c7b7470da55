"""``python -m dsqjob``."""

from dsqjob.cli.main import main

if __name__ == "__main__":
    main()
