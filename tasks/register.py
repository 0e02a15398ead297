"""The stage `register`, as DVC calls it."""

import sys

from tasks.launch.trial import try_out
from tasks.record.tracking import send_pending
from tasks.work.register import main

if __name__ == "__main__":
    main(sys.argv[1:], try_out, send_pending)
