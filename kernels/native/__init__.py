"""The CPU engine: C++ in src/, its C interface in include/unetrt_native.h, its use from Python in library.py."""
