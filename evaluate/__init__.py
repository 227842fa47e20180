"""Importable as `fedcmp.evaluate` alone: under two names modules would be loaded twice."""

if __name__ != "fedcmp.evaluate":
    raise ImportError(f"import fedcmp.evaluate instead of {__name__}")
