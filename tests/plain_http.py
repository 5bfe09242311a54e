"""httpx's functions for servers without TLS: its own make a TLS context for each call, which takes 20 ms of a core.

A test that looks 20 times a second whether something has come true would take half of a core for that.
"""

import ssl
from functools import partial

import httpx

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # that trusts nobody

request = partial(httpx.request, verify=NO_TLS)
get, head = partial(httpx.get, verify=NO_TLS), partial(httpx.head, verify=NO_TLS)
put, post, delete = (partial(each, verify=NO_TLS) for each in (httpx.put, httpx.post, httpx.delete))
