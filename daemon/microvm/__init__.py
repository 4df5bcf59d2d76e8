"""``hyperbell microvm``: its options, its guest, the terminal it borrows."""
