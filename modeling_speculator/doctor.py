"""Is everything here as this package expects it: the libraries, the machine, a model of one's own?

python -m modeling_speculator.doctor
python -m modeling_speculator.doctor --base_model X --speculator Y

The door alone; what is done is in `measuring/doctor.py`.
"""

from .measuring.doctor import main


if __name__ == "__main__":
    main()
