"""A cluster on one machine, made of the real parts: network namespaces, containerd, docker-registry, moto, windlass.

Everything lives in namespaces and under one temporary directory, and ends with the rig: the host's network, its
containerd and its /run are never touched.
"""
