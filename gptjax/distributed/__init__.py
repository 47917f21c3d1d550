"""How the processes of one run find each other, agree that they are one, wait for each other and end together.

It runs before JAX and beside it: a peer that is missing, different or dead is one line of text here, where JAX would abort.
"""

from gptjax.distributed.group import ProcessGroup, all_gather, broadcast, is_primary, join, process_group
from gptjax.distributed.discovery import CLUSTERS, GroupSpec, discover
from gptjax.distributed.notices import watch_notices
from gptjax.distributed.rendezvous import address, bind_address

__all__ = ['CLUSTERS', 'GroupSpec', 'ProcessGroup', 'address', 'all_gather', 'bind_address', 'broadcast', 'discover', 'is_primary', 'join',
           'process_group', 'watch_notices']
