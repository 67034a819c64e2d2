package stored

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// Disk is what a control-plane node has in its /etc/kubernetes, without the keys: certificates are told by what is in them, and
// issued anew. Names of files are relative to that directory.
type Disk struct {
	// Texts are the files that have neither a key nor a certificate in them.
	Texts        map[string]string
	Certificates []Certificate
	// KeyPairs are the names, without .key and .pub, of keys that no certificate is for.
	KeyPairs    []string
	Kubeconfigs []Kubeconfig
}

// Certificate says what is in a certificate, and who signed it.
type Certificate struct {
	Name          string // of its files, without .crt and .key; empty in a kubeconfig
	Signer        string // the Name of the authority; its own for one that signed itself
	CommonName    string
	Organizations []string
	DNSNames      []string
	Addresses     []netip.Addr
	KeyUsage      x509.KeyUsage
	ExtKeyUsages  []x509.ExtKeyUsage
	Authority     bool
	Lifetime      time.Duration
}

// Kubeconfig is a file with a client's certificate in it.
type Kubeconfig struct {
	File, Cluster, Server, User, Context string
	Authority                            string // the Name of the certificate that the server is known by
	Client                               Certificate
}

// ReadDisk reads /etc/kubernetes. Files for which leave is true are not told of. It is an error if a file is of a form that is not
// known, since a key could be in it.
func ReadDisk(dir fs.FS, leave func(name string) bool) (Disk, error) {
	d := Disk{Texts: map[string]string{}}
	authorities := map[string]*x509.Certificate{}
	leaves := map[string]*x509.Certificate{}
	configs := map[string]*clientcmdapi.Config{}
	err := fs.WalkDir(dir, ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || leave(name) {
			return err
		}
		if !e.Type().IsRegular() {
			return fmt.Errorf("%s is no file", name)
		}
		base, ext := strings.TrimSuffix(name, path.Ext(name)), path.Ext(name)
		if ext == ".key" {
			return nil // the certificate beside it, or the public key, tells of it
		}
		data, err := fs.ReadFile(dir, name)
		if err != nil {
			return err
		}
		switch ext {
		case ".crt":
			cert, err := parseCertificate(data)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			if cert.IsCA {
				authorities[base] = cert
			} else {
				leaves[base] = cert
			}
		case ".pub":
			block, _ := pem.Decode(data)
			if block == nil {
				return fmt.Errorf("%s has no key", name)
			}
			key, err := x509.ParsePKIXPublicKey(block.Bytes)
			if _, known := key.(*ecdsa.PublicKey); err != nil || !known {
				return fmt.Errorf("%s: %w", name, errors.Join(errKeyKind, err))
			}
			d.KeyPairs = append(d.KeyPairs, base)
		case ".conf":
			if configs[name], err = clientcmd.Load(data); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		case ".yaml":
			if IsSecret(data) {
				return fmt.Errorf("%s has a key, a certificate or a token in it", name)
			}
			d.Texts[name] = string(data)
		default:
			return fmt.Errorf("%s is of no known form", name)
		}
		return nil
	})
	if err != nil {
		return Disk{}, err
	}
	for _, certs := range []map[string]*x509.Certificate{authorities, leaves} {
		for name, cert := range certs {
			c, err := describe(name, cert, authorities)
			if err != nil {
				return Disk{}, err
			}
			d.Certificates = append(d.Certificates, c)
		}
	}
	slices.SortFunc(d.Certificates, func(a, b Certificate) int { return strings.Compare(a.Name, b.Name) })
	for name, config := range configs {
		k, err := describeKubeconfig(name, config, authorities)
		if err != nil {
			return Disk{}, fmt.Errorf("%s: %w", name, err)
		}
		d.Kubeconfigs = append(d.Kubeconfigs, k)
	}
	slices.SortFunc(d.Kubeconfigs, func(a, b Kubeconfig) int { return strings.Compare(a.File, b.File) })
	return d, nil
}

var errKeyKind = errors.New("the key is of another kind than ECDSA")

func parseCertificate(data []byte) (*x509.Certificate, error) {
	block, rest := pem.Decode(data)
	if block == nil || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("it does not have the one certificate that is expected")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, err
	}
	if _, known := cert.PublicKey.(*ecdsa.PublicKey); !known {
		return nil, errKeyKind
	}
	return cert, nil
}

// contents says what is in a certificate, but for its signer.
func contents(name string, cert *x509.Certificate) Certificate {
	c := Certificate{
		Name: name, CommonName: cert.Subject.CommonName, Organizations: cert.Subject.Organization, DNSNames: cert.DNSNames,
		KeyUsage: cert.KeyUsage, ExtKeyUsages: cert.ExtKeyUsage, Authority: cert.IsCA, Lifetime: cert.NotAfter.Sub(cert.NotBefore),
	}
	for _, ip := range cert.IPAddresses {
		if a, ok := netip.AddrFromSlice(ip); ok {
			c.Addresses = append(c.Addresses, a.Unmap())
		}
	}
	return c
}

func describe(name string, cert *x509.Certificate, authorities map[string]*x509.Certificate) (Certificate, error) {
	c := contents(name, cert)
	for signer, authority := range authorities {
		if cert.CheckSignatureFrom(authority) == nil {
			c.Signer = signer
			return c, nil
		}
	}
	return Certificate{}, fmt.Errorf("the certificate of %s was signed by an authority that is not there", cert.Subject)
}

func describeKubeconfig(file string, config *clientcmdapi.Config, authorities map[string]*x509.Certificate) (Kubeconfig, error) {
	k := Kubeconfig{File: file, Context: config.CurrentContext}
	current := config.Contexts[k.Context]
	if current == nil || len(config.Contexts) != 1 || len(config.Clusters) != 1 || len(config.AuthInfos) != 1 {
		return Kubeconfig{}, errors.New("it does not have one context, cluster and user")
	}
	k.Cluster, k.User = current.Cluster, current.AuthInfo
	cluster, user := config.Clusters[k.Cluster], config.AuthInfos[k.User]
	if cluster == nil || user == nil || len(user.ClientCertificateData) == 0 || user.Token != "" || user.Password != "" {
		return Kubeconfig{}, errors.New("its user is not known by a certificate")
	}
	k.Server = cluster.Server
	cert, err := parseCertificate(user.ClientCertificateData)
	if err != nil {
		return Kubeconfig{}, err
	}
	if k.Client, err = describe("", cert, authorities); err != nil {
		return Kubeconfig{}, err
	}
	ca, err := parseCertificate(cluster.CertificateAuthorityData)
	if err != nil {
		return Kubeconfig{}, err
	}
	for name, authority := range authorities {
		if authority.Equal(ca) {
			k.Authority = name
			return k, nil
		}
	}
	return Kubeconfig{}, errors.New("its authority is not there")
}

// Keys are what the control-plane nodes of a cluster have in common: its authorities and the keys that no certificate is for.
type Keys struct {
	authorities map[string]*issued
	pairs       map[string]*ecdsa.PrivateKey
}

// issued is a certificate with its key.
type issued struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewKeys makes the keys of a cluster whose control-plane nodes have such disks.
func NewKeys(disks map[string]Disk) (*Keys, error) {
	k := &Keys{authorities: map[string]*issued{}, pairs: map[string]*ecdsa.PrivateKey{}}
	for _, d := range disks {
		for _, c := range d.Certificates {
			if !c.Authority || k.authorities[c.Name] != nil {
				continue
			}
			if c.Signer != c.Name {
				return nil, fmt.Errorf("the authority %s is below another, %s", c.Name, c.Signer)
			}
			authority, err := k.issue(c, nil)
			if err != nil {
				return nil, err
			}
			k.authorities[c.Name] = authority
		}
		for _, name := range d.KeyPairs {
			if k.pairs[name] != nil {
				continue
			}
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				return nil, err
			}
			k.pairs[name] = key
		}
	}
	return k, nil
}

// Public are the certificates of the authorities, by their names, for an Identity.
func (k *Keys) Public() map[string]string {
	public := map[string]string{}
	for name, a := range k.authorities {
		public[name] = string(encode("CERTIFICATE", a.cert.Raw))
	}
	return public
}

// issue makes a certificate and its key; one that signs itself without a signer.
func (k *Keys) issue(c Certificate, signer *issued) (*issued, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 63))
	if err != nil {
		return nil, err
	}
	notBefore := time.Now().Add(-5 * time.Minute).UTC() // kubeadm's allowance for clocks that differ
	t := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: c.CommonName, Organization: c.Organizations},
		NotBefore: notBefore, NotAfter: notBefore.Add(c.Lifetime), KeyUsage: c.KeyUsage, ExtKeyUsage: c.ExtKeyUsages,
		BasicConstraintsValid: true, IsCA: c.Authority, DNSNames: c.DNSNames,
	}
	for _, a := range c.Addresses {
		t.IPAddresses = append(t.IPAddresses, net.IP(a.AsSlice()))
	}
	if signer == nil {
		signer = &issued{t, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, signer.cert, key.Public(), signer.key)
	if err != nil {
		return nil, fmt.Errorf("issue the certificate of %s: %w", c.CommonName, err)
	}
	cert, err := x509.ParseCertificate(der)
	return &issued{cert, key}, err
}

// sign issues a certificate by the authority that signed the one of the template, with the addresses of a new cluster.
func (k *Keys) sign(c Certificate, from, to Identity) (*issued, error) {
	authority := k.authorities[c.Signer]
	if authority == nil {
		return nil, fmt.Errorf("there is no authority %s for the certificate of %s", c.Signer, c.CommonName)
	}
	c.Addresses = slices.Clone(c.Addresses)
	for i, a := range c.Addresses {
		if moved, ok := move(a, from.Underlays(), to.Underlays()); ok {
			c.Addresses[i] = moved
		}
	}
	return k.issue(c, authority)
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(key)
	return encode("EC PRIVATE KEY", der), err
}

func encodePublic(key crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	return encode("PUBLIC KEY", der), err
}

// Personalize returns the files of a control-plane node's /etc/kubernetes for a new cluster, which has the keys.
func (d Disk) Personalize(from, to Identity, keys *Keys) (map[string][]byte, error) {
	files := map[string][]byte{}
	put := func(name string, data []byte, err error) error {
		files[name] = data
		return err
	}
	for name, text := range d.Texts {
		files[name] = []byte(MoveAddresses(text, from.Underlays(), to.Underlays()))
	}
	for _, name := range d.KeyPairs {
		key := keys.pairs[name]
		private, err := encodeKey(key)
		public, err2 := encodePublic(key.Public())
		if err := errors.Join(put(name+".key", private, err), put(name+".pub", public, err2)); err != nil {
			return nil, err
		}
	}
	for _, c := range d.Certificates {
		made, err := keys.authorities[c.Name], error(nil)
		if !c.Authority {
			made, err = keys.sign(c, from, to)
		}
		if err != nil {
			return nil, err
		}
		files[c.Name+".crt"] = encode("CERTIFICATE", made.cert.Raw)
		key, err := encodeKey(made.key)
		if err := put(c.Name+".key", key, err); err != nil {
			return nil, err
		}
	}
	for _, k := range d.Kubeconfigs {
		made, err := keys.sign(k.Client, from, to)
		if err != nil {
			return nil, err
		}
		key, err := encodeKey(made.key)
		if err != nil {
			return nil, err
		}
		authority := keys.authorities[k.Authority]
		if authority == nil {
			return nil, fmt.Errorf("there is no authority %s for %s", k.Authority, k.File)
		}
		data, err := clientcmd.Write(clientcmdapi.Config{
			Clusters: map[string]*clientcmdapi.Cluster{k.Cluster: {
				Server: MoveAddresses(k.Server, from.Underlays(), to.Underlays()), CertificateAuthorityData: encode("CERTIFICATE", authority.cert.Raw),
			}},
			AuthInfos:      map[string]*clientcmdapi.AuthInfo{k.User: {ClientCertificateData: encode("CERTIFICATE", made.cert.Raw), ClientKeyData: key}},
			Contexts:       map[string]*clientcmdapi.Context{k.Context: {Cluster: k.Cluster, AuthInfo: k.User}},
			CurrentContext: k.Context,
		})
		if err := put(k.File, data, err); err != nil {
			return nil, err
		}
	}
	return files, nil
}

// Files are the keys as files, by names relative to /etc/kubernetes: those that ReadKeys reads.
func (k *Keys) Files() (map[string][]byte, error) {
	files := map[string][]byte{}
	for name, a := range k.authorities {
		files[name+".crt"] = encode("CERTIFICATE", a.cert.Raw)
		key, err := encodeKey(a.key)
		if err != nil {
			return nil, fmt.Errorf("write the key of %s: %w", name, err)
		}
		files[name+".key"] = key
	}
	for name, pair := range k.pairs {
		key, err := encodeKey(pair)
		if err != nil {
			return nil, fmt.Errorf("write the key %s: %w", name, err)
		}
		files[name+".key"] = key
	}
	return files, nil
}

// ReadKeys reads the keys of a cluster whose control-plane nodes have such disks.
func ReadKeys(disks map[string]Disk, read func(name string) ([]byte, error)) (*Keys, error) {
	k := &Keys{authorities: map[string]*issued{}, pairs: map[string]*ecdsa.PrivateKey{}}
	for _, d := range disks {
		for _, c := range d.Certificates {
			if !c.Authority || k.authorities[c.Name] != nil {
				continue
			}
			data, err := read(c.Name + ".crt")
			if err != nil {
				return nil, err
			}
			cert, err := parseCertificate(data)
			if err != nil {
				return nil, fmt.Errorf("%s.crt: %w", c.Name, err)
			}
			key, err := readKey(c.Name+".key", read)
			if err != nil {
				return nil, err
			}
			if !key.PublicKey.Equal(cert.PublicKey) {
				return nil, fmt.Errorf("%s.key is not the key of %[1]s.crt", c.Name)
			}
			k.authorities[c.Name] = &issued{cert, key}
		}
		for _, name := range d.KeyPairs {
			if k.pairs[name] != nil {
				continue
			}
			key, err := readKey(name+".key", read)
			if err != nil {
				return nil, err
			}
			k.pairs[name] = key
		}
	}
	return k, nil
}

func readKey(name string, read func(name string) ([]byte, error)) (*ecdsa.PrivateKey, error) {
	data, err := read(name)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "EC PRIVATE KEY" {
		return nil, fmt.Errorf("%s: %w", name, errKeyKind)
	}
	key, err := x509.ParseECPrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return key, nil
}

// Pair is a certificate with its key, in PEM.
type Pair struct{ Certificate, Key []byte }

// PairLike makes a key, and a certificate for the same names as the first of those given. It signs itself.
func PairLike(certificates []byte) (*Pair, error) {
	block, _ := pem.Decode(certificates)
	if block == nil {
		return nil, errors.New("it has no certificate")
	}
	like, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, err
	}
	c := contents("", like)
	made, err := (&Keys{}).issue(c, nil)
	if err != nil {
		return nil, err
	}
	key, err := encodeKey(made.key)
	return &Pair{encode("CERTIFICATE", made.cert.Raw), key}, err
}
