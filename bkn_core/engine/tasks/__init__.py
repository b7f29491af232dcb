"""What a network learns: what each kind of task says of data, loss and measures."""
