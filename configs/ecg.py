"""ECG beats (MIT-BIH, 187 samples) with the settings of the paper (MedFuncta, MIDL 2026).

Command:   python -m experiments.main --config=configs/ecg.py --workdir=runs/ecg --data_dir=DIR
           DIR holds mitbih_train.csv and mitbih_test.csv (188 columns, no header); raw PhysioNet records:
           --config.data.format=physionet. Variant ecg.py:cpu for two cores.
           ecg.py:leads, and ecg.py:leads_cpu for two cores: DIR holds records of twelve leads, 10 s at 100 Hz, as WFDB
           or DICOM; of PTB-XL with --config.data.pattern='records100/**/*' --config.data.labels=ptbxl_database.csv
           --config.data.id_column=filename_lr --config.data.label_column=sex --config.data.patient_column=patient_id
Hardware:  published: one A100 of 40 GB, 250,000 iterations. cpu: 2 cores, 1723 s of training
           beside other work (measured).
Result:    published, test set: PSNR 43.301 dB, MSE 0.086e-3, SSIM 0.964. Not trained to the end here.
           leads, leads_cpu: frequencies of the other two in proportion to the samples, a latent of one number for 12
           or 23 values; not trained to the end here. (On one recording of 10 s, turned in time, width and latent 256:
           600 steps reach 25.9 dB with frequencies of 30, 28.8 dB with 100 and 29.3 dB with 200.)
           cpu: test PSNR 39.1 dB, MSE 0.19e-3, SSIM 0.940 (measured on 5400 training beats and 1500 test beats of
           other patients; PCA with 64 components: 36.8 dB, 0.934); validation, of the same patients as training: 40.4.
"""

from configs import base


def get_config(variant=""):
    base.require_variant(variant, "cpu", "leads", "leads_cpu")
    source = "leads" if variant.startswith("leads") else "csv"
    config = base.paper_1d(base.get_config("ecg", format=source))
    if source == "leads":
        config.model.update(latent_dim=1024, omega_first=100.0, omega_last=1000.0)
    if variant == "cpu":
        config = base.cpu(config, width=512, latent_dim=64, steps=20_000, batch_size=64)
        config.inner.update(gauss_newton_damping=0.03, step_size=0.3)
        config.train.update(optimizer="muon", augmentation=0.03)
        return config
    if variant == "leads_cpu":
        config = base.cpu(config, width=512, latent_dim=512, steps=5000, batch_size=16)
        config.model.update(omega_first=160.0, omega_last=160.0)
    return config
