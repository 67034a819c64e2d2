package stored

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

var (
	oldID = Identity{Underlay4: netip.MustParsePrefix("10.201.0.0/16"), Underlay6: netip.MustParsePrefix("fd00:201::/48")}
	newID = Identity{Underlay4: netip.MustParsePrefix("10.99.0.0/16"), Underlay6: netip.MustParsePrefix("fd00:99::/48")}
)

func TestMoveAddresses(t *testing.T) {
	for in, want := range map[string]string{
		"":                              "",
		"10.201.1.2":                    "10.99.1.2",
		"https://10.201.1.20:6443/x":    "https://10.99.1.20:6443/x",
		"10.201.0.0/16,fd00:201::/48":   "10.99.0.0/16,fd00:99::/48",
		"[fd00:201:0:1::2]:2380":        "[fd00:99:0:1::2]:2380",
		"a=https://10.201.1.2:2380,b=x": "a=https://10.99.1.2:2380,b=x",
		"10.202.1.2 110.201.1.2":        "10.202.1.2 110.201.1.2",
		"10.201.1.2.3 10.201.1 v1.36.3": "10.201.1.2.3 10.201.1 v1.36.3",
		"see 10.201.1.2.":               "see 10.99.1.2.",
		"at 12:30:01, fd00:201::1: yes": "at 12:30:01, fd00:99::1: yes",
	} {
		if got := MoveAddresses(in, oldID.Underlays(), newID.Underlays()); got != want {
			t.Errorf("%q became %q, want %q", in, got, want)
		}
	}
}

// disk is an /etc/kubernetes with one of each kind of file.
func disk(t *testing.T) (fstest.MapFS, Disk) {
	t.Helper()
	d := Disk{
		Texts: map[string]string{"manifests/etcd.yaml": "args: [--listen=https://10.201.1.2:2379]\n"},
		Certificates: []Certificate{
			{Name: "pki/apiserver", Signer: "pki/ca", CommonName: "kube-apiserver", DNSNames: []string{"plane", "kubernetes"}, Addresses: []netip.Addr{netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("10.201.1.2")},
				KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment, ExtKeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, Lifetime: time.Hour},
			{Name: "pki/ca", Signer: "pki/ca", CommonName: "kubernetes", DNSNames: []string{"kubernetes"}, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, Authority: true, Lifetime: 2 * time.Hour},
			{Name: "pki/etcd/ca", Signer: "pki/etcd/ca", CommonName: "etcd-ca", KeyUsage: x509.KeyUsageCertSign, Authority: true, Lifetime: 2 * time.Hour},
		},
		KeyPairs: []string{"pki/sa"},
		Kubeconfigs: []Kubeconfig{{File: "admin.conf", Cluster: "east", Server: "https://10.201.1.2:6443", User: "kubernetes-admin", Context: "kubernetes-admin@east", Authority: "pki/ca",
			Client: Certificate{Signer: "pki/ca", CommonName: "kubernetes-admin", Organizations: []string{"kubeadm:cluster-admins"}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, Lifetime: time.Hour}}},
	}
	keys, err := NewKeys(map[string]Disk{"plane": d})
	if err != nil {
		t.Fatal(err)
	}
	files, err := d.Personalize(oldID, oldID, keys)
	if err != nil {
		t.Fatal(err)
	}
	fs := fstest.MapFS{}
	for name, data := range files {
		fs[name] = &fstest.MapFile{Data: data}
	}
	return fs, d
}

func none(string) bool { return false }

// What is read of a disk is what it was made of, and a disk of a new cluster has the same in it, with other addresses and keys.
func TestDisk(t *testing.T) {
	first, want := disk(t)
	got, err := ReadDisk(first, none)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("read\n%+v\nwant\n%+v", got, want)
	}
	text, err := json.Marshal(got)
	if err != nil || bytes.Contains(text, []byte("PRIVATE")) || bytes.Contains(text, []byte("BEGIN")) {
		t.Errorf("a template has a key: %s", text)
	}
	keys, err := NewKeys(map[string]Disk{"plane": got})
	if err != nil {
		t.Fatal(err)
	}
	files, err := got.Personalize(oldID, newID, keys)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != len(first) {
		t.Errorf("%d files of %d", len(files), len(first))
	}
	moved := fstest.MapFS{}
	for name, data := range files {
		moved[name] = &fstest.MapFile{Data: data}
		if name != "manifests/etcd.yaml" && bytes.Equal(data, first[name].Data) {
			t.Errorf("%s is the same in two clusters", name)
		}
		if bytes.Contains(data, []byte("10.201.")) {
			t.Errorf("%s has an address of the other cluster", name)
		}
	}
	again, err := ReadDisk(moved, none)
	if err != nil {
		t.Fatal(err)
	}
	back, err := json.Marshal(again)
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.ReplaceAll(string(text), "10.201.1.2", "10.99.1.2"); string(back) != want {
		t.Errorf("the new disk:\n%s\nwant\n%s", back, want)
	}
	// The certificates are good for those who ask.
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(files["pki/ca.crt"])
	config, err := clientcmd.Load(files["admin.conf"])
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"apiserver": files["pki/apiserver.crt"], "admin": config.AuthInfos["kubernetes-admin"].ClientCertificateData} {
		block, _ := pem.Decode(data)
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What is not understood could be a key, and no template is made.
func TestDiskRefused(t *testing.T) {
	for name, change := range map[string]func(fstest.MapFS){
		"a file of another form": func(fs fstest.MapFS) { fs["token"] = &fstest.MapFile{Data: []byte("x")} },
		"a text with a key":      func(fs fstest.MapFS) { fs["a.yaml"] = &fstest.MapFile{Data: []byte("-----BEGIN RSA PRIVATE KEY-----")} },
		"no certificate":         func(fs fstest.MapFS) { fs["pki/ca.crt"] = &fstest.MapFile{Data: []byte("x")} },
		"a chain": func(fs fstest.MapFS) {
			fs["pki/apiserver.crt"].Data = append(fs["pki/apiserver.crt"].Data, fs["pki/ca.crt"].Data...)
		},
		"an authority that is not": func(fs fstest.MapFS) { delete(fs, "pki/ca.crt") },
		"another public key":       func(fs fstest.MapFS) { fs["pki/sa.pub"] = &fstest.MapFile{Data: []byte("x")} },
		"a kubeconfig with a token": func(fs fstest.MapFS) {
			c, _ := clientcmd.Load(fs["admin.conf"].Data)
			c.AuthInfos["kubernetes-admin"] = &clientcmdapi.AuthInfo{Token: "x"}
			data, _ := clientcmd.Write(*c)
			fs["admin.conf"] = &fstest.MapFile{Data: data}
		},
		"a kubeconfig of two": func(fs fstest.MapFS) {
			c, _ := clientcmd.Load(fs["admin.conf"].Data)
			c.Clusters["b"] = &clientcmdapi.Cluster{}
			data, _ := clientcmd.Write(*c)
			fs["admin.conf"] = &fstest.MapFile{Data: data}
		},
	} {
		fs, _ := disk(t)
		change(fs)
		if _, err := ReadDisk(fs, none); err == nil {
			t.Errorf("%s is no error", name)
		}
	}
}
