"""Benchmarks: a plan of attacks and defences, a store of results, tables and pages made from it.

Nothing is imported here: tables and pages must not wait for torch.
"""

__all__: list[str] = []
