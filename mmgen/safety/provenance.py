"""Where a picture comes from: a signed C2PA manifest in the file, and a watermark in its pixels that is there when the manifest is
gone. `Signer` writes both, `verify` reads them.

A folder of keys holds `key.pem` (private, ES256), `chain.pem` (its certificate and that of who vouches for it), `anchor.pem` (the
latter alone: what those who verify have to trust) and `watermark.key`. `make_keys` makes one whose certificates vouch for
themselves: they show that a file is as it was signed and by the same hand as others, not whose hand that is; for that put a certificate that
others trust in its place.
"""

import base64
import contextlib
import datetime
import io
import json
import os
import secrets
from pathlib import Path

import c2pa
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image

import mmgen
from mmgen.safety import watermark

FILES = ("key.pem", "chain.pem", "anchor.pem", "watermark.key")
GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
RECIPE = "org.mmgen.recipe"
CODES = "org.mmgen.codes"
FORMATS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".tif": "image/tiff", ".tiff": "image/tiff"}  # fmt: skip
_DECODED = ("PNG", "JPEG", "WEBP", "TIFF")  # by Pillow, to know of which of FORMATS a file is
STATES = ("valid", "tampered", "watermark only", "unsigned")
_YEARS = 10


def keys_folder():
    """Where keys are kept that nobody named: made at the first use."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "mmgen" / "keys"


def make_keys(folder):
    """A new folder of keys. FileExistsError where there are some: what they signed could not be verified any more."""
    folder = Path(folder)
    if there := [name for name in FILES if (folder / name).exists()]:
        raise FileExistsError(f"{folder} has {', '.join(there)} already: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    anchor, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    above = _certificate("mmgen local anchor", "mmgen local anchor", anchor, anchor, True)
    leaf = _certificate("mmgen signer", "mmgen local anchor", key, anchor, False)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    contents = (private, leaf + above, above, secrets.token_bytes(32))
    for name, content in zip(FILES, contents):
        path = folder / name
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
    return folder


def _certificate(subject, issuer, key, signer, above):
    """PEM of a certificate as C2PA asks for it. above: of who vouches for others."""
    name = lambda text: x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "mmgen"),
            x509.NameAttribute(NameOID.COMMON_NAME, text),
        ]
    )
    begin = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)
    uses = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
    uses = dict.fromkeys(uses, False) | {"key_cert_sign" if above else "digital_signature": True}
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=365 * _YEARS))
        .add_extension(x509.BasicConstraints(ca=above, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**uses), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    if not above:
        builder = builder.add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
        )
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


class Signer:
    """Signs pictures with the keys of a folder; without one with those of `keys_folder`, which are made at the first use.

    FileNotFoundError where a named folder lacks a key."""

    def __init__(self, folder=None):
        if folder is None and not (folder := keys_folder()).exists():
            try:
                print(f"keys to sign pictures with are made in {make_keys(folder)}")
            except OSError as error:
                raise OSError(
                    f"cannot make keys to sign pictures with: {error}; say --keys DIR, or --no-provenance"
                ) from None
        self.folder = Path(folder)
        if lacking := [name for name in FILES if not (self.folder / name).exists()]:
            raise FileNotFoundError(
                f"{self.folder} lacks {', '.join(lacking)}: `mmgen tools verify --make-keys DIR` makes all"
            )
        self._watermark = (self.folder / "watermark.key").read_bytes()

    def mark(self, pixels):
        """Pixels uint8 [H, W, 3 or 4] with the watermark, if they are large enough for one."""
        return watermark.embed_where_it_lasts(pixels, self._watermark)

    def unmarked(self, pixels):
        """Pixels uint8 [H, W, 3 or 4] without the watermark, if they have it: see `watermark.remove`."""
        return watermark.remove(pixels, self._watermark)

    def sign(self, data, suffix, recipe, title="picture", codes=None):
        """The bytes of an image file with a manifest: that a model drew it, and `recipe`, a dict of what it was drawn with.
        codes: int32 of any shape, of which the tokenizer named in the recipe made the picture; `codes_in` reads them. Give none where the file
        does not show what they say (pasted, or hardly recognisable by JPEG): what is judged of a picture is its pixels."""
        if suffix.lower() not in FORMATS:
            raise ValueError(f"a {suffix} file cannot be signed: expected one of {', '.join(FORMATS)}")
        manifest = {
            "claim_generator_info": [{"name": "mmgen", "version": mmgen.__version__}],
            "title": title,
            "assertions": [
                {
                    "label": "c2pa.actions.v2",
                    "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": GENERATED}]},
                },
                {"label": RECIPE, "data": recipe},
                *([] if codes is None else [{"label": CODES, "data": _written(codes)}]),
            ],
        }
        out = io.BytesIO()
        with (
            c2pa.Settings.from_dict({"builder": {"thumbnail": {"enabled": False}}}) as settings,
            c2pa.Context(settings) as context,
        ):
            with self._signer() as signer, c2pa.Builder(manifest, context=context) as builder:
                builder.sign(signer, FORMATS[suffix.lower()], io.BytesIO(data), out)
        return out.getvalue()

    def codes_in(self, data, tokenizer):
        """The codes, int32, of which a tokenizer (its hash) made the picture in an image file (its bytes), exactly as they were drawn;
        None where this key did not sign it, it has been changed since, or the manifest has none of that tokenizer."""
        try:
            with Image.open(io.BytesIO(data), formats=_DECODED) as image:
                kind = image.get_format_mimetype()
        except OSError:
            return None
        state, manifest, _ = _manifest(data, kind, self.folder) or ("", None, ())
        # Others' certificates may be vouched for by the same anchor, and what they say of pixels is not ours to believe.
        own = x509.load_pem_x509_certificate((self.folder / "chain.pem").read_bytes()).serial_number
        if state != "Trusted" or manifest["signature_info"].get("cert_serial_number") != str(own):
            return None
        has = {each["label"]: each["data"] for each in manifest["assertions"]}
        if CODES not in has or has.get(RECIPE, {}).get("tokenizer") != tokenizer:
            return None
        return _read(has[CODES])

    def _signer(self):
        return c2pa.Signer.from_info(
            c2pa.C2paSignerInfo(
                alg=b"es256",
                sign_cert=(self.folder / "chain.pem").read_bytes(),
                private_key=(self.folder / "key.pem").read_bytes(),
                ta_url=None,
            )  # fmt: skip
        )


def verify(path, folder=None):
    """What is known of an image file -> {"state": one of STATES, ...}.

    "valid": as it was signed ("trusted" says whether by our own keys' anchor; "recipe" what it was drawn with). "tampered": it has a
    manifest, and is not what was signed. "watermark only": no manifest, but the pixels have the watermark of our key.
    "unsigned": neither. Everywhere "watermark": its score in standard deviations, None without a key. folder: keys, as of `Signer`.
    """
    path, folder = Path(path), Path(folder or keys_folder())
    data = path.read_bytes()
    kind = FORMATS.get(path.suffix.lower())
    found = {"file": str(path), "state": "unsigned", "watermark": None}
    if (folder / "watermark.key").exists():
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))
        score = watermark.score(pixels, (folder / "watermark.key").read_bytes())
        found["watermark"] = round(score, 2)
        if score >= watermark.FOUND:
            found["state"] = "watermark only"
    if kind is None:
        return found
    if (read := _manifest(data, kind, folder)) is None:
        return found
    state, manifest, why = read
    found |= {"state": "tampered" if state == "Invalid" else "valid", "why": why}
    if manifest is None:
        return found
    recipe = [each["data"] for each in manifest.get("assertions", ()) if each["label"] == RECIPE]
    return found | {"trusted": state == "Trusted", "recipe": recipe[0] if recipe else None}


def _manifest(data, kind, folder):
    """What an image file's bytes, of a MIME type, have been signed with -> None, or (state as C2PA names it: Trusted by the anchor in `folder`,
    Valid or Invalid; the manifest, None where it cannot be read; why)."""
    # Files are anybody's: no address in them is asked for a manifest.
    trust = {"verify": {"verify_trust": True, "remote_manifest_fetch": False}}
    if (folder / "anchor.pem").exists():
        trust["trust"] = {"user_anchors": (folder / "anchor.pem").read_text()}
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(c2pa.Context(stack.enter_context(c2pa.Settings.from_dict(trust))))
        try:
            reader = stack.enter_context(c2pa.Reader(kind, io.BytesIO(data), context=context))
            state, about = reader.get_validation_state(), json.loads(reader.json())
            manifest = about["manifests"][about["active_manifest"]]
        except c2pa.C2paError.ManifestNotFound:
            return None
        except (c2pa.C2paError, KeyError) as error:  # a manifest that cannot be read is none that was written
            return "Invalid", None, [str(error)]
    return state, manifest, [each["code"] for each in about.get("validation_status", ())]


def _written(codes):
    codes = np.ascontiguousarray(codes, "<i4")
    # The shape in words: the library takes a list of small numbers for bytes.
    return {"shape": "x".join(map(str, codes.shape)), "int32": base64.b64encode(codes.tobytes()).decode()}


def _read(written):
    shape = [int(side) for side in written["shape"].split("x")]
    return np.frombuffer(base64.b64decode(written["int32"]), "<i4").astype(np.int32).reshape(shape)
