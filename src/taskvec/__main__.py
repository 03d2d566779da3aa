"""``python -m taskvec`` is the command ``taskvec``."""

from taskvec.cli import main

if __name__ == "__main__":
    main()
