"""Importable as `fedcmp.extract` alone: under two names modules would be loaded twice."""

if __name__ != "fedcmp.extract":
    raise ImportError(f"import fedcmp.extract instead of {__name__}")
