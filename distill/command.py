"""What all commands share: log lines and exit codes.

Exit code 0: done. 2: something the user can mend, told in one message. 128 + n: stopped by signal n,
with everything saved. What is said goes through `distill/redact.py` first.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable

from distill.config import UserError
from distill.progress import Interrupted
from distill.redact import Redacted, redact

TRACKER_THREAD = "tracker"


def guarded(work: Callable[[], object]) -> int:
    """Do the work of a command; errors become a message and an exit code."""
    code = _guarded(work)
    if any(thread.name == TRACKER_THREAD for thread in threading.enumerate()):
        # It was given up, but its library's exit hook would wait for it without end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _guarded(work: Callable[[], object]) -> int:
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(Redacted("%(message)s"))
    try:
        work()
    except Interrupted as stop:
        if main_process:
            print(f"\n{stop}. Run the same command to go on.", file=sys.stderr)
        return 128 + stop.signum
    except UserError as error:
        if main_process or error.every_process:
            print(f"error: {redact(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if main_process:
            print("\nstopped by SIGINT. Run the same command to go on.", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception:  # a fault of ours: its traceback is wanted, what may stand in it is not
        print(redact(traceback.format_exc()), file=sys.stderr)
        return 1
    return 0
