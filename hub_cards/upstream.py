"""Private API of Transformers and huggingface_hub that this package relies on.

A release may move or change any of these names; `tests/test_upstream.py` then names it, and what needs it.
"""

# The identity of a file on the Hub, to tell which ones a push would change: push.py.
from huggingface_hub.utils.sha import git_hash, sha_fileobj

# The code files that a code file needs, as `trust_remote_code` collects them: push.py, model_checks.py.
from transformers.dynamic_module_utils import get_relative_import_files

__all__ = ["get_relative_import_files", "git_hash", "sha_fileobj"]
