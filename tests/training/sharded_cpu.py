"""The command with FSDP on CPU processes: Accelerate offers it on GPUs alone, but torch shards over gloo as well."""

import sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

plain = AcceleratorState.__init__


def with_sharding(self, *args, fsdp_plugin=None, **kwargs):
    fresh = not self.initialized
    plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fresh and fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = with_sharding

if __name__ == "__main__":
    from carina.cli import main

    sys.exit(main(sys.argv[1:]))
