"""What a job costs: FLOPs, bytes and time, counted, profiled and planned."""
