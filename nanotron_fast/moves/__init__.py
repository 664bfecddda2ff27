"""The move: what it is, the proof that moves fill a file, and the engines that execute them."""
