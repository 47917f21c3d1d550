"""The processes room: how the processes of one run find each other, agree that they are one, wait for each other and end together.

It runs before JAX and beside it: a peer that is missing, different or dead is one line of text here, where JAX would abort.
"""

from gptjax.processes.company import Company, company, first, gather, join, share
from gptjax.processes.discovery import CLUSTERS, Group, discover
from gptjax.processes.notices import watch_notices
from gptjax.processes.rendezvous import address, bind_address

__all__ = ['CLUSTERS', 'Company', 'Group', 'address', 'bind_address', 'company', 'discover', 'first', 'gather', 'join', 'share',
           'watch_notices']
