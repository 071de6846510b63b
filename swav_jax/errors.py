"""What a user can mend: one line that names the setting, its value, what is allowed, what to do."""


class UserError(Exception):
    """A mistake of the user's: `main` prints it, without a stack trace, and exits with 2."""


class SaidElsewhereError(UserError):
    """A mistake that process 0 has told the user; this process ends without a word."""
