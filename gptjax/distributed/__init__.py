"""The processes of one run: they find each other, check that they belong to the same run, wait for each other and end together.

`jax.distributed` and `jax.experimental.multihost_utils` do not suffice: they abort from C++ when a peer is missing or dies, run on devices,
and do not notice peers with other code or another config. Here each of these ends every process with one line that names the peer.
"""

from gptjax.distributed.cloud import watch_notices
from gptjax.distributed.discovery import CLUSTERS, GroupSpec, discover, visible_gpus
from gptjax.distributed.group import ProcessGroup, all_gather, broadcast, is_primary, join, process_group
from gptjax.distributed.rendezvous import address, bind_address
