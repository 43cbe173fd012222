"""What a hostile container, process or host tries, and what it must not get."""
