"""Device code: pointers, sizes, strides; no torch. One file per host file that launches it."""
