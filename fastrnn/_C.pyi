"""The compiled part. Importing it registers ``torch.ops.fastrnn``; it has nothing else to offer Python."""
