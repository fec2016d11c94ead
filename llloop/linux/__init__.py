"""System calls, wire structs and credentials of Linux."""
