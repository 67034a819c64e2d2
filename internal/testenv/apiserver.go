package testenv

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"
)

// APIServer starts the kit's etcd and kube-apiserver for the time of a test, and returns a kubeconfig of an
// administrator. No more of a cluster is there: what has no controller here does not happen. Services are in
// 10.96.0.0/16.
func APIServer(t *testing.T) (kubeconfig string) {
	t.Helper()
	if testing.Short() {
		t.Skip("starts an API server")
	}
	_, file, _, _ := runtime.Caller(0)
	kit := os.Getenv("FATHOM_KIT")
	if kit == "" {
		kit = filepath.Join(filepath.Dir(file), "../../bin/kit")
	}
	NeedFile(t, filepath.Join(kit, "bin/kube-apiserver"), "`make kit` builds it")
	dir := t.TempDir()
	etcd, peers, api := freePort(t), freePort(t), freePort(t)
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	serviceAccounts := write("sa.key", pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}))
	token := rand.Text()
	tokens := write("tokens.csv", fmt.Appendf(nil, "%s,admin,admin,system:masters\n", token))
	start := func(program string, args ...string) {
		log, err := os.Create(filepath.Join(dir, program+".log"))
		if err != nil {
			t.Fatal(err)
		}
		defer log.Close()
		cmd := exec.Command(filepath.Join(kit, "bin", program), args...)
		cmd.Stdout, cmd.Stderr = log, log
		// It goes with the test even if that is killed. The signal is tied to the thread that started it.
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		started := make(chan error)
		end := make(chan struct{})
		ended := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			defer close(ended)
			if err := cmd.Start(); err != nil {
				started <- err
				return
			}
			close(started)
			<-end
			_ = cmd.Process.Kill()
			_ = cmd.Wait() // says that it was killed
		}()
		if err := <-started; err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			close(end)
			<-ended
			if t.Failed() {
				data, _ := os.ReadFile(log.Name())
				t.Logf("%s: %s", program, data[max(0, len(data)-500):])
			}
		})
	}
	url := func(port int) string { return fmt.Sprintf("http://127.0.0.1:%d", port) }
	start("etcd", "--data-dir="+filepath.Join(dir, "etcd"), "--unsafe-no-fsync", "--listen-client-urls="+url(etcd), "--advertise-client-urls="+url(etcd),
		"--listen-peer-urls="+url(peers), "--initial-advertise-peer-urls="+url(peers), "--initial-cluster=default="+url(peers))
	start("kube-apiserver", "--etcd-servers="+url(etcd), "--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", api), "--cert-dir="+filepath.Join(dir, "certs"),
		"--service-account-issuer=https://kubernetes", "--service-account-key-file="+serviceAccounts, "--service-account-signing-key-file="+serviceAccounts,
		"--token-auth-file="+tokens, "--authorization-mode=RBAC", "--service-cluster-ip-range=10.96.0.0/16", "--disable-admission-plugins=ServiceAccount")
	server := fmt.Sprintf("https://127.0.0.1:%d", api)
	client := &http.Client{Timeout: time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} // its certificate is new
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		resp, err := client.Get(server + "/readyz")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				break
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("the API server is not ready: %v", err)
		}
	}
	return write("kubeconfig", fmt.Appendf(nil, `apiVersion: v1
kind: Config
current-context: test
clusters: [{name: test, cluster: {server: %q, insecure-skip-tls-verify: true}}]
users: [{name: test, user: {token: %q}}]
contexts: [{name: test, context: {cluster: test, user: test}}]
`, server, token))
}

// freePort returns a port that nobody listens on.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}
