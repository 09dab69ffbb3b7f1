"""What a model costs under secure multi-party computation, measured in SecretFlow SPU."""

from normfree.private.environment import ENVIRONMENT, PYTHON_VARIABLE, Engine, find_engine
from normfree.private.measurement import FIELDS, PROTOCOLS, Cost, Measurer, Protocol, Settings
from normfree.private.model import EncryptedRun, block_cost, run_encrypted
from normfree.private.operations import GROUPS, Operation, Step, alternatives, block_steps, model_steps
from normfree.private.parties import EngineError
from normfree.private.projection import NETWORKS, Network, parse_network

__all__ = [
    "ENVIRONMENT",
    "FIELDS",
    "GROUPS",
    "NETWORKS",
    "PROTOCOLS",
    "PYTHON_VARIABLE",
    "Cost",
    "EncryptedRun",
    "Engine",
    "EngineError",
    "Measurer",
    "Network",
    "Operation",
    "Protocol",
    "Settings",
    "Step",
    "alternatives",
    "block_cost",
    "block_steps",
    "find_engine",
    "model_steps",
    "parse_network",
    "run_encrypted",
]
