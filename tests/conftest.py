"""Every Ray of the tests, also in child processes, is guarded by one token that no file holds."""

import os
import secrets

os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
