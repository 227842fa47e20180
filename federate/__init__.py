"""Importable as `fedcmp.federate` alone: under two names modules would be loaded twice."""

if __name__ != "fedcmp.federate":
    raise ImportError(f"import fedcmp.federate instead of {__name__}")
