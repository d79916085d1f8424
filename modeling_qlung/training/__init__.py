"""What only a trainer needs: losses, sharpness-aware steps, the Trainer, augmentation, sampling, data, arguments."""
