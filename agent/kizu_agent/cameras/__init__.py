"""Cameras: one driver per file behind one small protocol, opened by URL.

Drivers run in the capture child process only (see capture.py): a native call that hangs is killed with it.
"""
