"""The bytes of ZeRO stages 1, 2 and 3, as DeepSpeed lays them out."""
