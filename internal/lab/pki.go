package lab

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/fathom-network/fathom/internal/facts/topology"
)

// Where a node keeps what kubelet serves with.
const (
	kubeletCert = "/var/lib/kubelet/pki/kubelet.crt"
	kubeletKey  = "/var/lib/kubelet/pki/kubelet.key"
	// What the controller manager and the scheduler serve with. By themselves each makes two RSA keys at its start, which takes
	// 0.1 s of processor time when all wait for it.
	managerCert   = "/etc/kubernetes/pki/kube-controller-manager.crt"
	managerKey    = "/etc/kubernetes/pki/kube-controller-manager.key"
	schedulerCert = "/etc/kubernetes/pki/kube-scheduler.crt"
	schedulerKey  = "/etc/kubernetes/pki/kube-scheduler.key"
	clusterCA     = "/etc/kubernetes/pki/ca.crt"
	clusterKey    = "/etc/kubernetes/pki/ca.key"
)

// authority is a cluster's certificate authority, which kubeadm made on the first control-plane node.
type authority struct {
	pair tls.Certificate
	pem  []byte
}

func (l *Lab) authority(c *topology.Cluster) (*authority, error) {
	first := c.Nodes[0].Name
	pair, err := tls.LoadX509KeyPair(l.diskFile(first, clusterCA), l.diskFile(first, clusterKey))
	if err != nil {
		return nil, fmt.Errorf("read the certificate authority of cluster %s: %w", c.Name, err)
	}
	data, err := os.ReadFile(l.diskFile(first, clusterCA))
	if err != nil {
		return nil, err
	}
	return &authority{pair: pair, pem: data}, nil
}

// issue makes a key and a certificate that is good for a year, as kubeadm's are.
func (a *authority) issue(subject pkix.Name, usage x509.ExtKeyUsage, names []string, addrs []netip.Addr) (cert, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: subject,
		NotBefore: time.Now().Add(-5 * time.Minute), NotAfter: time.Now().AddDate(1, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
		BasicConstraintsValid: true, DNSNames: names,
	}
	for _, addr := range addrs {
		template.IPAddresses = append(template.IPAddresses, net.IP(addr.AsSlice()))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.pair.Leaf, private.Public(), a.pair.PrivateKey)
	if err != nil {
		return nil, nil, err
	}
	keyDER, err := x509.MarshalECPrivateKey(private)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}), nil
}

// credentials returns the files by which a node's programs are known: the certificates that they serve with,
// and, for a worker, kubelet.conf and the authority's certificate, as `kubeadm join` leaves them. Signing
// here saves the certificate request and its approval, which take seconds.
func (l *Lab) credentials(c *topology.Cluster, n *topology.Node, a *authority) (map[string][]byte, error) {
	cert, key, err := a.issue(pkix.Name{CommonName: n.Name}, x509.ExtKeyUsageServerAuth, []string{n.Name}, l.NodeAddrs(c, n))
	if err != nil {
		return nil, fmt.Errorf("issue the serving certificate of node %s: %w", n.Name, err)
	}
	files := map[string][]byte{kubeletCert: cert, kubeletKey: key}
	if n.Role == topology.ControlPlane {
		for _, p := range []struct{ name, cert, key string }{
			{"kube-controller-manager", managerCert, managerKey}, {"kube-scheduler", schedulerCert, schedulerKey},
		} {
			local := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
			if files[p.cert], files[p.key], err = a.issue(pkix.Name{CommonName: p.name}, x509.ExtKeyUsageServerAuth, []string{"localhost"}, local); err != nil {
				return nil, fmt.Errorf("issue the serving certificate of %s on node %s: %w", p.name, n.Name, err)
			}
		}
		return files, nil // kubeadm wrote the rest
	}
	cert, key, err = a.issue(pkix.Name{CommonName: "system:node:" + n.Name, Organization: []string{"system:nodes"}},
		x509.ExtKeyUsageClientAuth, nil, nil)
	if err != nil {
		return nil, fmt.Errorf("issue the client certificate of node %s: %w", n.Name, err)
	}
	user, context := "system:node:"+n.Name, "system:node:"+n.Name+"@"+c.Name
	conf, err := clientcmd.Write(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{c.Name: {Server: l.apiURL(c), CertificateAuthorityData: a.pem}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{user: {ClientCertificateData: cert, ClientKeyData: key}},
		Contexts:       map[string]*clientcmdapi.Context{context: {Cluster: c.Name, AuthInfo: user}},
		CurrentContext: context,
	})
	if err != nil {
		return nil, err
	}
	files["/etc/kubernetes/kubelet.conf"] = conf
	files[clusterCA] = a.pem
	return files, nil
}

func (l *Lab) apiURL(c *topology.Cluster) string {
	return "https://" + netip.AddrPortFrom(l.APIAddr(c), apiPort).String()
}
