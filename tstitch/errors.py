"""The one kind of error that is the user's to mend.

Library code raises `InputError` with a sentence that says what to do; a script turns it into that sentence and exit code 2 (`tstitch.cli.run`).
Any other exception is a defect of ours and keeps its traceback.
"""


class InputError(ValueError):
    """Input that cannot be used; the message is one sentence that says what to do instead."""
