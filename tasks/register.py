"""The stage `register`, as DVC calls it."""

from tasks.work.register import main

if __name__ == "__main__":
    main()
