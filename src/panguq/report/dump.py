class Dump:
    @staticmethod
    def open(*a):
        return None
