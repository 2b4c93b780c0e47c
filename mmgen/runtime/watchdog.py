"""A process that is stuck says where, and ends: one host that waits for ever holds a whole pod."""

import contextlib
import faulthandler


class Watchdog:
    """Ends the process (status 1) when a step takes longer than `seconds`; 0 watches nothing.

    The stacks of all threads go to file 2, whatever Python's sys.stderr is by then. It is a timer of C, which neither the interpreter's lock nor a
    blocked main thread holds up. What takes longer by its nature (measuring, saving, and the first step, which is compiled)
    is given `allowance` times as long.
    """

    def __init__(self, seconds, allowance=4):
        self._seconds, self.allowance = seconds, allowance

    def arm(self, factor=1):
        """Begins anew to count."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds * factor, exit=True, file=2)

    @contextlib.contextmanager
    def patient(self):
        """Within, the limit is `allowance` times as long; after it, it begins anew."""
        self.arm(self.allowance)
        try:
            yield
        finally:
            self.arm()

    def rest(self):
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
