"""Importable as `fedcmp.pipeline` alone: under two names modules would be loaded twice."""

if __name__ != "fedcmp.pipeline":
    raise ImportError(f"import fedcmp.pipeline instead of {__name__}")
