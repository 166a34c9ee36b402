"""The version, said once: the package's metadata, ``linger.__version__`` and every exported file read it here."""

VERSION = "2.0.0"
