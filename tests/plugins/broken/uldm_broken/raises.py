raise ValueError("no such device\nin two lines")
