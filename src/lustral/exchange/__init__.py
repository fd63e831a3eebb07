"""Results in the forms that other tools read: pure functions from the records of ``result.json`` to plain data.

``sarif`` is for code scanning, ``cyclonedx`` for bills of materials, ``attestation`` for what is signed, ``schemas`` says what
our own JSON holds. Nothing here prints, reads a clock, or imports torch.
"""
