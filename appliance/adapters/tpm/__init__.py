"""The device's TPM 2.0: port `Tpm` on the TSS's ESAPI (`esys.py`), its keys and PCRs (`objects.py`), its refusals (`refusals.py`)."""

from appliance.adapters.tpm.esys import EsysTpm

__all__ = ["EsysTpm"]
